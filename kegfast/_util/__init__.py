"""What every room uses: argument checks, files, progress, timing, report pages."""

"""Published experiments as configurations, each run by one command."""

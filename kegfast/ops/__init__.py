"""The operators: per file one operator's wrapper, fake, autograd, autocast and FLOP formula."""

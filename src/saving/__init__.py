"""Every file that is written whole, and every file that is not trusted."""

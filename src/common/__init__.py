"""What every script needs: flags, errors, signals, several processes, progress."""

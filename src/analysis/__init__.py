"""What a trained model does, in figures, numbers and a report."""

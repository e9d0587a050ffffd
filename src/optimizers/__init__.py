"""What moves the weights: calls as text, schedules, averages, optimizers beyond PyTorch's."""

"""What keeps a run safe beneath the recipe: its files, its stops, how it goes on."""

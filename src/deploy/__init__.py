"""A trained model outside of training: exported, reading one's own pictures, as a web page."""

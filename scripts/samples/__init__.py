"""What `scripts.make_samples` writes: drawn images in every published form, a module for each family of forms."""

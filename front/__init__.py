"""A page to draw scenes in. `app.py` opens it; nothing of the project imports it."""

"""The web app that `app.py` serves: draw a scene, choose a run, sample.

Nothing of the project imports it.
"""

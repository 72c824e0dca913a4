"""Processes and devices: who runs beside whom, under which launcher, on which device, and what a signal does.

Nothing here knows what is trained.
"""

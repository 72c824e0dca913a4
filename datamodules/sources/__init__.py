"""Where Scenes come from: one module for each published form of data, and the embedded shapes.

The interface is `datamodules.sources.base.Source`. Nothing is imported here: a reader may need packages that others
do not.
"""

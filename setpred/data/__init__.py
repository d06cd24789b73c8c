"""Data: images with the sets of objects in them.

`python -m setpred data --help` prepares a CLEVR folder, renders built-in scenes, and checks and describes the files.
In code: `setpred.data.dataset` (torch data sets), `setpred.data.datamodule` (Lightning), `setpred.data.clevr` (the
CLEVR_v1.0 layout), `setpred.data.scenes`, `setpred.data.hdf5` (the file format). Nothing is imported here: the
commands and their worker processes do not need Lightning.
"""

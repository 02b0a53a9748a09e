"""A run, or the compressed table of another model, in the files of other programs.

`source` opens what is written, `formats` writes it. `modeling_pcagpt` and `load_coded`
are not imported here: they are copied into folders, where transformers runs them.
"""

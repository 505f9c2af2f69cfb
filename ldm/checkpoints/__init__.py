"""Weights as people have them: folders in diffusers' format, and original single files.

`ldm.loading` makes a pipeline of them, `ldm.inspect` says what they are, `ldm.convert` turns one into the other.

    checkpoint.py      what a folder and a file have in common: configurations, tokenizers, tensors by part
    folder.py          a folder becomes one
    single.py          a file becomes one, by these:
      recognise.py       what it is, by its keys and shapes (fit.py compares, kinds.py knows what else there is)
      names.py           original names and shapes, beside those of folders: the table
      flux_names.py      FLUX's
      architectures.py   the published configurations, which original files don't hold (own.py: but ours do)
      prediction.py      whether a network predicts noise or velocity: it is asked
      vocabulary.py      CLIP's vocabulary, which they don't hold either
    together.py        FLUX's transformer alone, with the other parts of another folder
    places.py          where a model of that name lies: with ldm, here, or on the hub (`ldm.hub`)
"""

"""How the embedded model was made: plain loops, one file a network, in the order in which they build on each other.

    data.py         the training pictures, drawn by `ldm.scenes`
    vae.py          pictures -> latents -> pictures
    vocabulary.py   the byte pairs of the captions
    clip.py         captions -> vectors, together with a tower for pictures
    checker.py      what does a picture show? (it judges, and takes no part in drawing)
    unet.py         noisy latents and vectors -> the noise
    export.py       all of them as a folder that `ldm.load` and diffusers read
    controlnet.py   edges or depth, beside the finished UNet -> what is added inside it
    depth_reader.py how deep is a picture? (it judges the ControlNet of depth)

`common.py`, `muon.py` and `parallel.py` hold what the loops share. `ldm train STAGE` runs one of them.
"""

"""LoRAs and their kin: small changes to a network's weights, from the files of every common trainer.

algebra     the published forms: how a few factors describe the change of a whole weight
names       whose names a file has, and which layers of ours they mean
groups      the factors of one layer, and whether they go together
peft        what PEFT says beside its factors: rank and alpha
file        a file, opened: told by its header, read when it is fitted
fitting     whether it is for this model
flux        FLUX's layers under their authors' names, of which one may be several of ours
applied     on a model: written into its weights or computed beside its layers, and taken away again
beside      ... a change that is computed beside its layer
wider       ... a FLUX that reads more by a LoRA
strength    ... how much it changes, in words
"""

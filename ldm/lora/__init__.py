"""LoRAs and their kin: small changes to a network's weights, from the files of every common trainer."""

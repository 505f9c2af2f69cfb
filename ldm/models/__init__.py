"""The networks: `blocks` are the bricks, `unet` predicts noise, `vae` turns pictures into latents and back."""

"""AdamP and SGDP: the stage, and the directions that it stands behind."""

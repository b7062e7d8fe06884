"""One paper, one file: equations, state, pure functions and the stage."""

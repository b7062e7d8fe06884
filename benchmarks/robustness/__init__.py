"""Does staying near the pretrained weights help? The protocol is in docs/evidence.md."""

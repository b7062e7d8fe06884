"""Does staying near the pretrained weights help? Settings x methods x seeds: see docs/evidence.md."""

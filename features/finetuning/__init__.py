"""Fine-tuning of encoders on the items of a catalogue."""

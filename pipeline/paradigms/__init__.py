"""The study of paradigms: specific, pre-trained, fine-tuned and jointly trained encoders in one table."""

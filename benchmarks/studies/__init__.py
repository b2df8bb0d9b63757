"""Studies against searches, and what they cost and survive."""

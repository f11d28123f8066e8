"""What the lessons show, play and check."""

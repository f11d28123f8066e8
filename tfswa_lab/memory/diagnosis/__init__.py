"""From steps that run again and again to a verdict: what grows, who makes it, who holds it."""

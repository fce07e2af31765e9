"""Reports, cards, synthetic text, and copies that may be published."""

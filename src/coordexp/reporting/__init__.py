"""From files on disk to a report that a person can decide with: text, figures, pictures."""

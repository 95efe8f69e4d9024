"""From files on disk to a report that supports a decision: text, figures, panels."""

"""Exported formats, their parity with the champion, and the bundle."""

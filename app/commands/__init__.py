"""The commands of `tuneyard`, one file per noun."""

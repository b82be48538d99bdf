"""What people read: the files of a trial, the tables and lines of the console."""

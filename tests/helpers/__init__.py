"""What several test modules need: faulty files, arrays to try, HTML to read, the command to run."""

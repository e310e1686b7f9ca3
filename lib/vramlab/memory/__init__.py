"""Where bytes come from: the event meter, and the operating system's own figure to hold it against."""

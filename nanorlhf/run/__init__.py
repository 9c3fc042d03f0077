"""What a script needs around its loop: flags, inputs, the device, the run folder, the console, trackers, signals.
Nothing here knows what is trained."""

"""What a user sees: devices, streams, events, buffers, programs. One noun a file."""

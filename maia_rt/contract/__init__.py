"""What hardware, firmware, driver and compiler agree on: registers, commands, records, program images."""

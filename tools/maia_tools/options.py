"""Options that several commands share."""

from __future__ import annotations

import click

device_option = click.option("--device", "-d", metavar="SEL",
                             help="Which device: index, PCI address, socket path or 'emulated'.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

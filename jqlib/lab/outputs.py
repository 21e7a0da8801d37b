"""What of a cell's outputs is there to be read: no progress, and what was printed line by line in one piece."""

import re

# what a run says of its artifacts
PROGRESS = re.compile(r"^(reusing|resuming from|another process is) .*\n?", re.MULTILINE)


def to_read(outputs: list) -> list:
    """A cell's outputs (nbformat's) without what goes to stderr or is said of artifacts; prints in a row
    are joined, in place."""
    found = []
    for output in outputs:
        if output.output_type != "stream":
            found.append(output)
        elif output.name == "stdout":
            output.text = PROGRESS.sub("", output.text)
            if found and found[-1].output_type == "stream":
                found[-1].text += output.text
            elif output.text.strip():
                found.append(output)
    return found

"""POST standard input to an address, as a program of its own: it can be ended whatever it waits for.

A slow name lookup or a trickling server cannot be ended in time within a process. It prints why the text was not
accepted, and ends with 1 then.
"""

import http.client
import signal
import sys
import urllib.error
import urllib.request


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: it would become a GET, which leaves the body behind."""

    def redirect_request(self, *_: object) -> None:
        """None: the answer that redirects is an error."""


def _post(url: str, body: bytes) -> str | None:
    """Send a JSON text; None when it was accepted, else why not."""
    request = urllib.request.Request(  # noqa: S310 - the policy takes http and https only
        url, data=body, headers={"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.build_opener(_NoRedirects).open(request):
            return None
    except urllib.error.HTTPError as error:
        with error:
            return f"it answered {error.code} {error.reason}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        # no connection, a reset, a bad address, an answer that is not HTTP
        return f"it cannot be reached: {getattr(error, 'reason', None) or error}"


if __name__ == "__main__":
    signal.alarm(1 + int(float(sys.argv[2])))  # also when nobody is left to stop it
    sys.exit(_post(sys.argv[1], sys.stdin.buffer.read()))

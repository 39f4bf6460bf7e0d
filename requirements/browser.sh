#!/bin/sh
# Installs Chromium for the tests of the report's pages, where it is missing and this is possible. Without it they are skipped.
for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null && exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update && apt-get install -y --no-install-recommends chromium; } >/dev/null 2>&1 && exit 0
fi
echo "browser: there is no Chromium and it could not be installed; the tests that open pages in a browser are skipped" >&2

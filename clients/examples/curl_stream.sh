#!/bin/sh
# Print an answer with curl while it is generated: clients/examples/curl_stream.sh [FILE]
set -eu
here=$(dirname "$0")
picture=$(base64 <"${1:-$here/red_circle.png}" | tr -d '\n')
curl --silent --show-error --fail-with-body --no-buffer \
    "${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}/chat/completions" \
    --header 'Content-Type: application/json' --data @- << END |
{
  "model": "saccade-tiny",
  "temperature": 0,
  "stream": true,
  "messages": [{"role": "user", "content": [
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,$picture"}},
    {"type": "text", "text": "What is in the image?"}
  ]}]
}
END
    sed -n 's/^data: .*"content":"\([^"]*\)".*/\1/p' | tr -d '\n'
echo

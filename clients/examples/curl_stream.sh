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
    {
        status=1 # until the answer is complete
        while IFS= read -r line || [ -n "$line" ]; do
            case $line in
            "data: [DONE]") status=0 ;;
            *'"content":"'*)
                text=${line#*'"content":"'}
                printf %b "${text%%'"},"'*}"
                ;;
            "{"*) printf '%s\n' "$line" >&2 ;; # a refusal
            esac
        done
        echo
        exit $status
    }

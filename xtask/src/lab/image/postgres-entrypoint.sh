#!/bin/sh
# Entry point of the lab's PostgreSQL image. Understands what the official image's users set: POSTGRES_PASSWORD,
# POSTGRES_USER, POSTGRES_DB, PGDATA. Without a password everybody is let in: this image is for tests.
set -eu
CLUSTER=/usr/local/share/cluster

case "${1:-postgres}" in
-*) set -- postgres "$@" ;;
postgres | "") ;;
*) exec "$@" ;;
esac

if [ "$(id -u)" = 0 ]; then
    mkdir -p "$PGDATA" /run/postgresql
    chown postgres:postgres /run/postgresql
    find "$PGDATA" ! -user postgres -exec chown postgres:postgres {} +
    chmod 700 "$PGDATA"
    exec setpriv --reuid=postgres --regid=postgres --clear-groups /bin/sh "$0" "$@"
fi

if [ ! -s "$PGDATA/PG_VERSION" ]; then
    echo "filling the empty data directory $PGDATA"
    cp -R "$CLUSTER/." "$PGDATA/"
    chmod -R go-rwx "$PGDATA"
    # Single-user mode reads one statement a line and needs the mark of a whole cluster.
    cp "$CLUSTER.version" "$PGDATA/PG_VERSION.new"
    user=${POSTGRES_USER:-postgres}
    database=${POSTGRES_DB:-$user}
    method=trust
    sql=
    [ "$user" = postgres ] || sql="CREATE ROLE \"$user\" SUPERUSER LOGIN;"
    if [ -n "${POSTGRES_PASSWORD:-}" ]; then
        method=scram-sha-256
        quoted=$(printf %s "$POSTGRES_PASSWORD" | sed "s/'/''/g")
        sql="$sql
ALTER ROLE \"$user\" PASSWORD '$quoted';"
    fi
    [ "$database" = postgres ] || sql="$sql
CREATE DATABASE \"$database\" OWNER \"$user\";"
    cat >"$PGDATA/pg_hba.conf" <<END
local all all trust
host all all 127.0.0.1/32 trust
host all all ::1/128 trust
host all all all $method
END
    if [ -n "$sql" ]; then
        cp "$CLUSTER.version" "$PGDATA/PG_VERSION"
        if ! printf '%s\n' "$sql" | postgres --single -D "$PGDATA" postgres >/tmp/setup.log 2>&1; then
            cat /tmp/setup.log >&2
            rm -f "$PGDATA/PG_VERSION"
            exit 1
        fi
    fi
    mv "$PGDATA/PG_VERSION.new" "$PGDATA/PG_VERSION"
fi
exec "$@"

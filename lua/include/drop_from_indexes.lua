-- Take a connection out of everything that lists it, except its user's list: last_seen, its game, its server.
-- Each command names the sid, so none can touch another connection of the user (guarantees 1 and 3).
local function drop_from_indexes(key_prefix, last_seen_key, sid, game_id, server)
  redis.call('ZREM', last_seen_key, sid)
  if game_id ~= '' then
    redis.call('HDEL', key_prefix .. 'game_conns:' .. game_id, sid)
  end
  if server ~= '' then
    redis.call('SREM', key_prefix .. 'server_conns:' .. server, sid)
  end
end

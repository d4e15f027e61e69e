-- Take a connection out of every structure: its record, last_seen, its user's connections, its game.
-- It names the sid in each, so it cannot touch another connection of the user (guarantees 1 and 3).
local function remove_connection(key_prefix, last_seen_key, connection)
  local sid, user_id, game_id = connection[1], connection[2], connection[3]
  redis.call('DEL', key_prefix .. 'conn:' .. sid)
  redis.call('ZREM', last_seen_key, sid)
  redis.call('ZREM', key_prefix .. 'user_conns:' .. user_id, sid)
  if game_id ~= '' then
    redis.call('HDEL', key_prefix .. 'game_conns:' .. game_id, sid)
  end
end

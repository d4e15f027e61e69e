-- Read a connection: {sid, user_id, game_id or '', connected_at ms, last_seen ms}, in the order in which every reply
-- lists one, or nil when it is unknown or expired.
local function read_live_connection(conn_key, last_seen_key, sid, oldest_live_ms)
  local last_seen = redis.call('ZSCORE', last_seen_key, sid)
  if not last_seen or tonumber(last_seen) < oldest_live_ms then
    return nil
  end
  local record = redis.call('HMGET', conn_key, 'user_id', 'game_id', 'connected_at')
  if not record[1] then
    return nil
  end
  return {sid, record[1], record[2], record[3], last_seen}
end

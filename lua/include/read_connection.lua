-- Read a connection, as every reply lists one: {sid, user_id, game_id or '', epoch, connected_at ms or '' where it is
-- the epoch's, last heartbeat ms or '' where the score is it, score}. The score in last_seen is the last heartbeat in
-- ms or, of a detached connection, minus the end of its grace. Nil when there is no record.
local function read_connection(conn_key, sid, score)
  local record = redis.call('HMGET', conn_key, 'user_id', 'game_id', 'epoch', 'connected_at', 'last_seen')
  if not record[1] then
    return nil
  end
  return {sid, record[1], record[2], record[3], record[4] or '', record[5] or '', score}
end

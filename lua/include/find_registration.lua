-- @include find_record
-- @include split_record
-- As find_record, but nil also if the record is not that of the registration with this epoch ('' = any).
local function find_registration(conn_key, last_seen_key, sid, now_ms, conn_ttl_ms, epoch)
  local record, score, is_detached = find_record(conn_key, last_seen_key, sid, now_ms, conn_ttl_ms)
  if record and epoch ~= '' then
    local _, _, _, its_epoch = split_record(record)
    record = its_epoch == epoch and record or nil
  end
  return record, score, is_detached
end

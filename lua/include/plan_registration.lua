-- @include split_record
-- @include split_owned
-- Decide what a registration does to the connections that are there, and take away the records of those of its user
-- that go. Gives a table:
--   refusing    the newest that is alive, where the policy refuses; then nothing else, and nothing was changed
--   own         what has the sid already, of the same user, live or within its grace; it is kept
--   replaced    what else had the sid, and goes, with its user_id; its record is still there
--   resumed     the connection whose seat, game and all, the new one takes: a detached one, which may be own, or one of
--               gone
--   was_online  whether one of the user's connections is not detached
--   gone        the user's other connections that go and are displaced, oldest first
--   taken       all whose records were taken away: those in gone, and resumed unless it is own
--   stay        the sids of those that stay, oldest first
-- Each connection is {sid, record, score, game_id, server}, by these names.
local function plan_registration(
  key_prefix, last_seen_key, sid, user_id, others, now_ms, conn_ttl_ms, connections_per_user, reject_ms, resumes,
  key_lifetime_ms
)
  local plan = {gone = {}, taken = {}, stay = {}}
  local scores = redis.call('ZMSCORE', last_seen_key, sid, unpack(others))
  local own_score = table.remove(scores, 1)

  local function take(other, score)
    local conn_key = key_prefix .. 'conn:' .. other
    local record, game_id, server = redis.call('GETDEL', conn_key), nil, nil
    if record then
      game_id, server = split_owned(conn_key, record, user_id, key_lifetime_ms)
    end
    local taken = game_id and {sid = other, record = record, score = score, game_id = game_id, server = server}
    plan.taken[#plan.taken + 1] = taken
    return taken
  end
  -- What a score says of its connection: 'seat', detached and within its grace; 'alive', seen so recently that the
  -- policy refuses a newer one (none is where the newest wins); 'live', seen within its TTL; nil, holding nothing.
  local function state_of(score)
    local seen = tonumber(score)
    if -seen >= tonumber(now_ms) then
      return 'seat'
    end
    if seen < now_ms - conn_ttl_ms then
      return nil
    end
    return reject_ms > 0 and seen >= now_ms - reject_ms and 'alive' or 'live'
  end

  -- 1. What has the sid already. Where its score was lost, its record still tells where else it is listed.
  own_score = own_score or 0
  local own_record = redis.call('GET', key_prefix .. 'conn:' .. sid)
  if own_record then
    local game_id, its_user_id, server = split_record(own_record)
    local had_sid = {
      sid = sid, record = own_record, score = own_score, game_id = game_id, server = server, user_id = its_user_id,
    }
    local state = state_of(own_score)
    if its_user_id == user_id and state then
      plan.own = had_sid
      plan.resumed = state == 'seat' and had_sid or nil
    else
      plan.replaced = had_sid
    end
  end

  -- 2. The user's other connections: how many there will be with the new one, which keep it out, and whose seat can be
  -- resumed.
  local count, states, alive, seat_index = 1, {}, {}, nil
  for index, other in ipairs(others) do
    local score = scores[index]
    plan.was_online = plan.was_online or (score and tonumber(score) >= 0)
    local state = score and other ~= sid and state_of(score)
    if state then
      states[index] = state
      count = count + 1
      if state == 'alive' then
        alive[#alive + 1] = index
      elseif state == 'seat' and not plan.own then
        seat_index = index
      end
    end
  end

  -- 3. The refusal. A connection that is live is only refreshed, and that is never refused.
  while #alive >= connections_per_user and (plan.resumed or not plan.own) do
    local newest = table.remove(alive)
    local record = redis.call('GET', key_prefix .. 'conn:' .. others[newest])
    if record and select(2, split_record(record)) == user_id then
      return {refusing = {sid = others[newest], record = record, score = scores[newest]}}
    end
    -- Its record was evicted, and may be another user's by now: it is not alive.
    states[newest] = nil
  end

  -- 4. Who goes: those that hold nothing any more, and the oldest of those that are not alive, until the limit is kept.
  if seat_index then
    plan.resumed = take(others[seat_index], scores[seat_index])
    count = count - 1
  end
  for index, other in ipairs(others) do
    if other ~= sid and index ~= seat_index then
      local state = states[index]
      if state and (count <= connections_per_user or state == 'alive') then
        plan.stay[#plan.stay + 1] = other
      else
        plan.gone[#plan.gone + 1] = take(other, scores[index] or 0)
        count = state and count - 1 or count
      end
    end
  end

  -- 5. Where no seat was kept, that of the newest live one that goes.
  if resumes and not plan.own and not plan.resumed then
    for _, gone in ipairs(plan.gone) do
      plan.resumed = state_of(gone.score) == 'live' and gone or plan.resumed
    end
  end
  return plan
end

-- @include split_record
-- @include split_body
-- @include take_record
-- Decide what a registration does, and take away the records of the other connections that go. Gives a table:
--   refusing    the connection that is alive; then there is nothing else, and nothing was changed
--   own         the connection itself, which is kept
--   replaced    what had its sid before, which is removed, with the user as a sixth item
--   resumed     the detached connection whose seat, with its game, it takes over
--   was_online  whether one of the user's connections is not detached
--   gone, stay  of the user's other connections, oldest first, those that go, and the sids of those that stay
-- Each connection is {sid, record, score, game_id, server}.
local function plan_registration(
  key_prefix, last_seen_key, sid, user_id, others, now, conn_ttl_ms, connections_per_user, reject_ms, key_lifetime_ms
)
  local plan = {gone = {}, stay = {}}
  local scores = redis.call('ZMSCORE', last_seen_key, sid, unpack(others))
  local own_score = table.remove(scores, 1)

  local function is_live(score)
    return tonumber(score) >= now - conn_ttl_ms
  end
  local function is_detached(score)
    return -score >= tonumber(now)
  end
  -- Of those that are live or detached. Nobody is where the newest wins.
  local function is_alive(score)
    return reject_ms > 0 and tonumber(score) >= now - reject_ms
  end

  local record = own_score and redis.call('GET', key_prefix .. 'conn:' .. sid)
  if record then
    local game_id, body = split_record(record)
    local its_user_id, _, _, _, server = split_body(body)
    local had_sid = {sid, record, own_score, game_id, server, its_user_id}
    if its_user_id == user_id and (is_live(own_score) or is_detached(own_score)) then
      plan.own = had_sid
      plan.resumed = is_detached(own_score) and had_sid or nil
    else
      plan.replaced = had_sid
    end
  end

  -- The user's other connections, oldest first: how many count, who is alive, whose seat is there to be resumed.
  local count, alive, seat_index = 1, {}, nil
  for index, other in ipairs(others) do
    local score = scores[index] or 0
    plan.was_online = plan.was_online or (scores[index] and tonumber(score) >= 0)
    if other ~= sid and (is_live(score) or is_detached(score)) then
      count = count + 1
      if is_alive(score) then
        alive[#alive + 1] = index
      elseif is_detached(score) and not plan.own then
        seat_index = index
      end
    end
  end
  if #alive >= connections_per_user and (plan.resumed or not plan.own) then
    local newest = alive[#alive]
    record = redis.call('GET', key_prefix .. 'conn:' .. others[newest])
    if record then
      return {refusing = {others[newest], record, scores[newest]}}
    end
    scores[newest] = false -- Its record was evicted, so it is not alive.
  end

  if seat_index then
    plan.resumed = take_record(key_prefix, others[seat_index], scores[seat_index], user_id, key_lifetime_ms)
    count = count - 1
  end
  for index, other in ipairs(others) do
    local score = scores[index] or 0
    local counts = is_live(score) or is_detached(score)
    if other ~= sid and index ~= seat_index then
      if not counts or (count > connections_per_user and not is_alive(score)) then
        plan.gone[#plan.gone + 1] = take_record(key_prefix, other, score, user_id, key_lifetime_ms)
        count = counts and count - 1 or count
      else
        plan.stay[#plan.stay + 1] = other
      end
    end
  end
  return plan
end
